//! Measures what the report claims of ndarray and of a mutex, and prints one JSON document.
//!
//! `context-forms` takes some minutes; `context-forms --quick` some seconds.

mod allocations;
mod cases;
mod context;
mod json;
mod memory;
mod norms;
mod random;
mod reference;
mod reuse;
mod turns;

use std::env;
use std::io;

use crate::cases::{Size, PATHS};
use crate::json::Json;

#[global_allocator]
static ALLOCATOR: allocations::Counting = allocations::Counting;

const SMALL: Size = (256, 384);
const SIZES: [Size; 2] = [(512, 768), SMALL];
const FORWARD_CALLS: usize = 20; // of a forward pass, as the report counts them

/// How long to measure.
struct Effort {
    timed: &'static [Size],
    blocks: usize,
    turns: usize,
    repeats: usize,
    calls: usize,
}

const FULL: Effort = Effort {
    timed: &SIZES,
    blocks: 20,
    turns: 12,
    repeats: 31,
    calls: 100_000,
};

const QUICK: Effort = Effort {
    timed: &[SMALL],
    blocks: 6,
    turns: 3,
    repeats: 6,
    calls: 10_000,
};

fn main() -> io::Result<()> {
    let arguments: Vec<String> = env::args().skip(1).collect();
    match arguments.first().map(String::as_str) {
        None => measure(&FULL),
        Some("--quick") => measure(&QUICK),
        Some(turns::WORKER) => {
            turns::answer(&arguments[1..]);
            Ok(())
        }
        Some(_) => Err(io::Error::other("the one option is --quick")),
    }
}

/// Check, measure, print.
fn measure(effort: &Effort) -> io::Result<()> {
    reference::check_formulas();
    SIZES.into_iter().for_each(reference::check_plans);

    let paths = |size| Json::object(PATHS.map(|path| (path, memory::path(path, size, 1))));
    let forwards = |size| memory::path("forward", size, FORWARD_CALLS);
    let document = Json::object([
        ("versions", versions()),
        ("effort", told(effort)),
        ("products", by_size(memory::products)),
        ("paths", by_size(paths)),
        ("traffic", by_size(forwards)),
        ("reuse", memory::streams()),
        ("times", times(effort)?),
        ("norms", norms::measure(effort.repeats, effort.calls)),
    ]);
    println!("{document}");
    Ok(())
}

fn versions() -> Json {
    Json::object([
        ("ndarray", env!("VERSION_NDARRAY")),
        ("matrixmultiply", env!("VERSION_MATRIXMULTIPLY")),
        ("rustc", env!("VERSION_RUSTC")),
    ])
}

fn told(effort: &Effort) -> Json {
    Json::object([
        ("forward_calls", FORWARD_CALLS),
        ("blocks", effort.blocks),
        ("turns", effort.turns),
        ("repeats", effort.repeats),
    ])
}

fn name((rows, dim): Size) -> String {
    format!("{rows} x {dim}")
}

fn by_size(measure: impl Fn(Size) -> Json) -> Json {
    Json::object(SIZES.map(|size| (name(size), measure(size))))
}

/// The times of every path, at the sizes that are timed.
fn times(effort: &Effort) -> io::Result<Json> {
    let mut found = vec![];
    for &size in effort.timed {
        let mut of_size = vec![];
        for path in PATHS {
            let times = turns::measure(path, size, effort.blocks, effort.turns)?;
            of_size.push((path, times));
        }
        found.push((name(size), Json::object(of_size)));
    }
    Ok(Json::object(found))
}
