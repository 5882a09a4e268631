"""The processes of a deployment: each connects a core to its sockets and runs one loop."""
