"""The running trader: closed bars in, decisions and paper positions out, every step journalled before the next.

feed      closed bars of all symbols in order, from the stream with the REST interface behind it
history   the newest candles in memory
forecast  indicators and one batched prediction for a bar
paper     positions kept from closed bars by the exit policy
journal   what a bar leaves in the database, and the state of a session read back from it
trader    one bar from its candles to its records
session   the loop over all of them
"""
