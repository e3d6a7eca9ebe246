"""`fairlane demo`: a whole sale on embedded servers, watched live, then audited, then beside one lock per item.

`stage` puts everything up and takes it down, `crowd` says who buys what and when, `buying` lets them do it over HTTP,
`live` shows it, `locked_way` sells the same with a lock, `report` is the end, and `run` is all of it in order.
"""
