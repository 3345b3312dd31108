"""The metric module rfid."""
