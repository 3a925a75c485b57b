"""The link between edges and control: both ends in one process, on real unix sockets."""
