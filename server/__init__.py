"""The Model Training Service: fine-tuning, retrieval and inference behind one protobuf contract."""
