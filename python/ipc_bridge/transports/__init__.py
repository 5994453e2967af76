"""One file a transport; each knows `system` and `errors`, and none knows another."""
