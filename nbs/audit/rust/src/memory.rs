//! What products, paths and changing shapes allocate.

use crate::allocations::{steady, Allocated};
use crate::cases::{sites, Case, Inputs, Size, PLANS};
use crate::context::{Form, Memory, Plan};
use crate::json::Json;
use crate::random::Random;
use crate::reuse::{replay, Capacity, ExactShape, RoundedCapacity};

const FORMS: [(&str, Plan); 3] = [
    ("dot", |_| Form::Dot),
    ("zeros + general_mat_mul", |_| Form::Zeros),
    ("kept + general_mat_mul", |_| Form::Kept),
];

/// Every product of a size in its three forms, which must give the same bits.
pub fn products(size: Size) -> Json {
    Json::object(sites(size).into_iter().map(|(site, slot, a, b)| {
        let wanted = a.dot(&b);
        let count = |plan| {
            let mut memory = Memory::new(plan);
            steady(|| {
                let out = memory.product(slot, &a, &b);
                assert!(out == wanted, "{site}: the forms differ");
                memory.give_back(slot, out);
            })
        };
        let found = FORMS.map(|(form, plan)| (form, count(plan)));
        for (form, Allocated { packing, .. }) in found {
            assert_eq!(packing.allocations, 1, "{site}, {form}: no packing buffer");
        }
        (site, Json::object(found))
    }))
}

/// What `calls` calls of a path allocate, in each plan.
pub fn path(path: &str, size: Size, calls: usize) -> Json {
    Json::object(PLANS.map(|(name, plan)| {
        let mut case = Case::new(path, plan, Inputs::new(size, 0));
        let allocated = steady(|| (0..calls).for_each(|_| case.call()));
        (name, allocated)
    }))
}

/// Streams of shapes, each through every kind of buffer.
pub fn streams() -> Json {
    let two = [(512, 768), (256, 768)].repeat(50);
    let mut random = Random::new(0);
    let many: Vec<Size> = (0..100).map(|_| (1 + random.below(512), 768)).collect();
    Json::object([
        ("two shapes in turn", stream(&two)),
        ("random lengths", stream(&many)),
    ])
}

fn stream(shapes: &[Size]) -> Json {
    let bytes = shapes.iter().map(|(rows, dim)| 4 * rows * dim);
    let exact = replay(ExactShape::default(), shapes);
    let capacity = replay(Capacity::default(), shapes);
    let rounded = replay(RoundedCapacity::default(), shapes);
    Json::object([
        ("requests", Json::from(shapes.len())),
        ("largest", Json::from(bytes.max().unwrap_or(0))),
        ("exact shape (original)", Json::from(exact)),
        ("capacity kept", Json::from(capacity)),
        ("power of two kept", Json::from(rounded)),
    ])
}
