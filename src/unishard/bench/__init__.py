"""Side-by-side measurements of unishard and its peers on one model, one data stream and one optimizer."""
