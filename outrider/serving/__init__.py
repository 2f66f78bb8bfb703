"""What every service's process does alike: gRPC server, health, status mapping, logs. No torch."""
