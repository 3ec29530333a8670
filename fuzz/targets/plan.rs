//! plan.json: a pruning plan, edited by hand perhaps, for a small model. One that is accepted is applied.
#![no_main]

use libfuzzer_sys::fuzz_target;
use quetsch::checkpoint::Checkpoint;
use quetsch::prune::{self, Budget, Magnitude, Plan};
use std::sync::LazyLock;

static PARENT: LazyLock<Checkpoint> = LazyLock::new(|| quetsch_fuzz::models().remove(0));

fuzz_target!(
    init: quetsch_fuzz::seeds(seeds),
    |data: &[u8]| {
        let Ok(plan) = serde_json::from_slice::<Plan>(data) else { return };
        let _ = plan.to_string();
        if let Ok(child) = plan.child(&PARENT.spec) {
            prune::masks(&PARENT.spec, &plan).expect("it was checked");
            assert_eq!(prune::apply(&PARENT, &plan).expect("it was checked").spec, child);
        }
    }
);

fn seeds() -> Vec<Vec<u8>> {
    let scores = prune::magnitude(&PARENT, Magnitude::L2);
    let mut plan = prune::plan(&PARENT.spec, &scores, &Budget::default()).expect("nothing to prune");
    let text = |plan: &Plan| serde_json::to_vec(plan).expect("JSON");
    let mut seeds = vec![text(&plan)];
    (plan.heads[0], plan.ffn[0]) = (vec![2], vec![0, 5]);
    seeds.push(text(&plan));
    plan.scores = scores;
    seeds.push(text(&plan));
    plan = prune::plan(&PARENT.spec, &plan.scores, &Budget::default()).expect("nothing to prune");
    plan.layers = vec![1];
    seeds.push(text(&plan));
    seeds
}
