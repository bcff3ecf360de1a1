#!/bin/sh
# Given to the SDK as its cli_path, which must be one program: launch.py does the work. Without the service's own
# Python ($HITL_PYTHON) nothing starts.
exec "${HITL_PYTHON:?}" -I -S "${0%.sh}.py" "$@"
