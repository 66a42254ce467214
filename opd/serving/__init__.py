"""What all HTTP services of opd share: application, server process, child process, client."""
