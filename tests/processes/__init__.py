"""Real processes for tests: started, signalled, restarted, and never left behind."""
