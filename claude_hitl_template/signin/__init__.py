"""Who uses the pages that this service serves: passwords, a sign-in provider, and the sessions of browsers."""
