"""Generated gRPC code (committed) and the few lines every server and client of ours shares."""
