"""The sections of params.yaml, one class each; glm.config puts them together and reads the file."""
