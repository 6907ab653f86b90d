"""The HTTP server: OpenAI's interface over glm.serving."""
