"""Uses the page of `asdm app` as people do: takes its pictures, and asks much of it for a long time."""
