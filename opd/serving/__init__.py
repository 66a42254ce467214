"""What every HTTP service of ours shares: application, server, child process, client."""
