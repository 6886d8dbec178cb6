# The package on CPU: docker build -t vlmq . && docker run --rm -v "$PWD/runs:/runs" vlmq validate --config eval
# For a GPU leave out the index of CPU wheels and add --gpus all to docker run.
FROM python:3.11-slim
WORKDIR /src
COPY . .
RUN pip install --no-cache-dir --extra-index-url https://download.pytorch.org/whl/cpu . && rm -rf /src
WORKDIR /runs
ENTRYPOINT ["vlmq"]
