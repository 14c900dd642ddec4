"""Which tensors should train? Methods of fine-tuning compared by what they forget at equal adaptation.

python -m benchmarks.forgetting benchmarks/forgetting/evidence/digits.toml
python -m benchmarks.forgetting --help
"""
