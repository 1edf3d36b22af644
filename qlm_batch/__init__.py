"""qlm-batch: LLM batch jobs with deadlines beside interactive traffic on the same engines."""
