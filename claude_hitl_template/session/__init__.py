"""One conversation: its runner, the gate, and the protocol of the engine that it drives. Knows neither Ray nor the SDK."""
