"""The benchmark behind `./hitl bench`: the service and the bare SDK, side by side. It measures, and decides nothing."""
