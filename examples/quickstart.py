"""SeTAR from end to end, offline: search ranks on real images, save, reload, merge, and compare detection."""

from peft import PeftModel, get_peft_model

from setar_peft import ImageSource, LoCoOpObjective, SeTARConfig, evaluate
from setar_peft.demo import digits

# A small CLIP, trained on handwritten digits on the first call; use any CLIPModel and CLIPProcessor instead.
model, processor = digits.load_model()
data = digits.load_images()

# The loss that the search minimises, on a few labelled in-distribution images.
objective = LoCoOpObjective(processor, data.class_names, *data.search, ood_weight=0.1, top_k=2)
test = ImageSource(processor, *data.test, class_names=data.class_names)

peft_model = get_peft_model(model, SeTARConfig(objective=objective))
variants = {"base": None, "SeTAR": "default"}
evaluation = evaluate(peft_model, test, data.ood, processor=processor, adapters=variants)

for name, ratio in peft_model.peft_config["default"].rank_ratios.items():
    print(f"{name}  {ratio:.2f}")
print(evaluation.table())

# An adapter like any other: it is saved, loaded onto a fresh base, and merged into a stock CLIPModel.
peft_model.save_pretrained("digits-setar")
base, _ = digits.load_model()
reloaded = PeftModel.from_pretrained(base, "digits-setar")
merged = reloaded.merge_and_unload()
after = evaluate(merged, test, data.ood, processor=processor)
assert after.metrics("mean", "mcm") == evaluation.metrics("mean", "mcm", "SeTAR")
