"""The HTTP service: OpenAI's images API and a page, drawn in batches by one pipeline."""
