"""One model under judgement: its records, the measures of each reliability dimension, and their standard errors."""
