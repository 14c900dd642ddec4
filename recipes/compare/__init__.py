"""Which tensors should train? Methods of fine-tuning compared by what they forget at equal adaptation.

python -m recipes.compare benchmarks/evidence/digits.toml
python -m recipes.compare --help
"""
