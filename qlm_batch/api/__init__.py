"""The REST API, compatible with OpenAI's Files and Batches."""
