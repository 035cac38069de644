"""What `make bench` measures: ours beside a peer or the plain way, in the same run on the same machine."""
