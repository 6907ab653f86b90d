"""What a person or a client talks to: the command line, chat, and the model behind MLflow's scoring server."""
