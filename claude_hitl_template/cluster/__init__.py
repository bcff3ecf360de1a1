"""What runs on Ray: the ledger, the supervisor, and an owner for each awake session."""

ROUTE = "/claude-hitl"  # with which the path of every request to the service begins
HTTP_SOCKETS = "http"  # folder in the data folder: where ingresses take requests from Serve's proxy
