"""What it costs to relay tokens to clients: the broker, and the HTTP gateway in front of it."""
