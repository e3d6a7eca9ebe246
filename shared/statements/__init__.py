"""The SQL that carries the promises, one module per verb. Plain text, run by whoever owns the transaction.

One lock order everywhere: lanes, then purchases by `seq`, then items by `sku COLLATE "C"`, then charge attempts;
`FOR NO KEY UPDATE` (a full `FOR UPDATE` on items would block every insert that references them); a locking SELECT with
ORDER BY before any UPDATE of several rows. READ COMMITTED throughout.

Lists travel as arrays, so a batch of any size is one statement with one plan.

A plan is kept by its connection, and may be from an hour when nobody had bought: any way through an empty table is as
good as another, and a minute of rush passes until Postgres plans anew. So each statement leaves one way open:

- Rows by their keys are named twice, by the join and by `= ANY`, or looked up one by one under LATERAL with a LIMIT. By
  the join alone the planner may read the whole table and hash it.
- The first of a line are read in the order of the index that holds that line. Whatever else is sorted is sorted by an
  expression (`seq + 0`), or an index in that order would be read from its beginning.
- A guard by state is a CASE. By the state as such, the index of all who are in it could be read, not that of the keys.
  For the same reason the predicates of some indexes are a CASE, of another form (`CASE WHEN status = …`), which only
  the question has that they are for.
"""
