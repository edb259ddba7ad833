"""What several test folders share: a running stack, a receiver of traces, a worker without processes."""
