"""The sandbox payment provider: a process that charges like a real one, and misbehaves on request.

It makes a new charge at every POST. It does not look at `Idempotency-Key`, except to write it into its
ledger: whoever calls twice has charged twice, and the ledger shows it. It never stores a payment token.

    python -m ops.provider --ledger FILE [--host 127.0.0.1] [--port 0] [--latency 0.05] [--port-file FILE]
    [--owned]

| payment token | what happens |
|---|---|
| `tok_declined…` | 402, reason `card_declined`, recorded as a declined charge |
| `tok_invalid…` | 422, nothing recorded |
| `tok_fault_<name>` | the fault of that name, see `faults.py` |
| `tok_fault_once_<name>` | the same, at the first POST of a reference only |
| anything else | 201, recorded as a succeeded charge |

`POST /faults {"status": 401, "seconds": 60}` makes it answer everybody so, charges and questions, for a while.
"""
