# From the photographs and captions of the data volume to a version in the registry. It promotes
# nothing, and no server hears of it. Arguments are overrides of the preset, such as scst=false.
#
# A run that is taken up again on the same day goes on where it was.
set -eu
run=$DATA/runs/$(date -u +%F)
python -m trainer auto "$DATA/photos" --answers "$DATA/captions.json" --labels "$LABELS" \
    --preset "$PRESET" --name "$MODEL" --registry "$run/registry" --out "$run" "$@"
python -m exports publish "$run/bundle/bundle" --registry "$CUTLINE_REGISTRY" --model "$MODEL"
