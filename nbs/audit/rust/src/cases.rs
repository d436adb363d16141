//! A path with its data and its memory, ready to be called again and again.

use std::hint::black_box;

use ndarray::Array2;

use crate::context::{backward, before, forward, kept, shipped, update, Memory, Plan, Slot};
use crate::random::Random;

pub const STRENGTH: f32 = 0.5;
pub const RATE: f32 = 0.1;

pub const PATHS: [&str; 3] = ["forward", "backward", "update"];
pub const PLANS: [(&str, Plan); 3] = [("before", before), ("shipped", shipped), ("kept", kept)];

/// Rows and features.
pub type Size = (usize, usize);

#[derive(Clone)]
pub struct Inputs {
    pub x: Array2<f32>,
    pub y: Array2<f32>,
    pub g: Array2<f32>,
    pub c: Array2<f32>,
}

impl Inputs {
    pub fn new((rows, dim): Size, seed: u64) -> Self {
        let mut random = Random::new(seed);
        let x = random.matrix((rows, dim));
        let y = &x + &random.matrix((rows, dim));
        Inputs {
            x,
            y,
            g: random.matrix((rows, dim)),
            c: 0.7 * random.matrix((dim, dim)),
        }
    }
}

pub struct Case {
    path: String,
    inputs: Inputs,
    memory: Memory,
}

impl Case {
    pub fn new(path: &str, plan: Plan, inputs: Inputs) -> Self {
        assert!(PATHS.contains(&path), "there is no path {path}");
        Case {
            path: path.to_string(),
            inputs,
            memory: Memory::new(plan),
        }
    }

    /// Run the path once, and show its result: an array, and for `backward` a number beside it.
    pub fn call_and<R>(&mut self, look: impl FnOnce(&Array2<f32>, f32) -> R) -> R {
        let Inputs { x, y, g, c } = &mut self.inputs;
        match self.path.as_str() {
            "forward" => {
                let out = forward(&mut self.memory, x, c, STRENGTH);
                let seen = look(&out, 0.0);
                self.memory.give_back(Slot::Apply, out);
                seen
            }
            "backward" => {
                let (grad_x, grad_s) = backward(&mut self.memory, x, c, STRENGTH, g);
                let seen = look(&grad_x, grad_s);
                self.memory.give_back(Slot::Corr, grad_x);
                seen
            }
            _ => {
                update(&mut self.memory, x, y, c, RATE);
                look(c, 0.0)
            }
        }
    }

    pub fn call(&mut self) {
        self.call_and(|array, number| {
            black_box((array, number));
        });
    }
}

/// The six products of one size: where, and of what.
pub fn sites(size: Size) -> Vec<(&'static str, Slot, Array2<f32>, Array2<f32>)> {
    let Inputs { x, y, g, c } = Inputs::new(size, 0);
    let (rows, dim) = (size.0.min(32), size.1);
    let mut random = Random::new(1);
    let mut columns_and_rows = || (random.matrix((dim, 1)), random.matrix((1, dim)));
    let ((norm_x, norm_y), (token_x, token_y)) = (columns_and_rows(), columns_and_rows());
    let first = |a: Array2<f32>| a.slice_move(ndarray::s![..rows, ..]);
    vec![
        ("cov", Slot::Cov, first(x.clone()).reversed_axes(), first(y)),
        ("denom", Slot::Denom, norm_x, norm_y),
        ("apply", Slot::Apply, x.clone(), c.clone()),
        ("mixed", Slot::Mixed, x, c.clone()),
        ("corr", Slot::Corr, g, c.reversed_axes()),
        ("step", Slot::Step, token_x, token_y),
    ]
}
