"""What an operator configures: settings, secrets, credentials, logs, and which code this is."""
