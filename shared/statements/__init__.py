"""The SQL that carries the promises, one module per verb. Plain text, run by whoever owns the transaction.

One lock order everywhere: lanes, then purchases by `seq`, then items by `sku COLLATE "C"`, then charge attempts;
`FOR NO KEY UPDATE` (a full `FOR UPDATE` on items would block every insert that references them); a locking SELECT with
ORDER BY before any UPDATE of several rows. READ COMMITTED throughout.

Lists travel as arrays, so a batch of any size is one statement with one plan.
"""
