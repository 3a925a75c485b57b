"""The words edge and control say to each other over a unix socket: structs, a client, a server."""
