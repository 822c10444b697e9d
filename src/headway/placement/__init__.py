"""Ring 3, puts: the driver, the engine process, its supervisor. The only place that knows time and sockets."""
