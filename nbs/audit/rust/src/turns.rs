//! Time of a path in several plans: each in a process of its own, all of them taking turns.
//!
//! Processes keep apart what one form would do to another through the allocator. A block is a new
//! set of them, with new data in new places, and gives one ratio for each plan.

use std::env;
use std::fs;
use std::io::{self, BufRead, BufReader, Write};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::time::Instant;

use crate::cases::{Case, Inputs, Size, PLANS};
use crate::json::Json;
use crate::random::Random;

pub const WORKER: &str = "worker"; // the first argument of such a process
const SAMPLE: f64 = 4e6; // nanoseconds that a sample takes at least

/// Page faults of this process so far, where the system tells.
fn page_faults() -> Option<usize> {
    let told = fs::read_to_string("/proc/self/stat").ok()?;
    let (_, after_name) = told.rsplit_once(')')?;
    after_name.split_whitespace().nth(7)?.parse().ok()
}

/// Answer each number of calls with the nanoseconds and the page faults of one.
///
/// Arguments: the path, the plan, rows, features, a seed.
pub fn answer(arguments: &[String]) {
    let [path, plan, rows, dim, seed] = arguments else {
        panic!("a worker has five arguments")
    };
    let number = |text: &str| text.parse::<usize>().expect("a number");
    let (_, plan) = PLANS
        .into_iter()
        .find(|(name, _)| name == plan)
        .expect("a plan");
    let inputs = Inputs::new((number(rows), number(dim)), number(seed) as u64);
    let mut case = Case::new(path, plan, inputs);
    for asked in io::stdin().lines() {
        let calls = number(&asked.expect("a line"));
        let faults = page_faults();
        let start = Instant::now();
        (0..calls).for_each(|_| case.call());
        let took = start.elapsed().as_nanos() as f64 / calls as f64;
        match (faults, page_faults()) {
            (Some(from), Some(to)) => println!("{took} {}", (to - from) as f64 / calls as f64),
            _ => println!("{took} NaN"),
        }
    }
}

/// Another process with one path in one plan. It ends when its input does.
struct Worker {
    process: Child,
    asked: Option<ChildStdin>,
    answers: BufReader<ChildStdout>,
}

/// Of one call.
#[derive(Clone, Copy)]
struct Sample {
    nanoseconds: f64,
    faults: f64,
}

impl Worker {
    fn start(path: &str, plan: &str, size: Size, seed: usize) -> io::Result<Self> {
        let mut process = Command::new(env::current_exe()?)
            .args([WORKER, path, plan])
            .args([size.0, size.1, seed].map(|number| number.to_string()))
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()?;
        let answers = BufReader::new(process.stdout.take().expect("it is piped"));
        Ok(Worker {
            asked: process.stdin.take(),
            process,
            answers,
        })
    }

    fn sample(&mut self, calls: usize) -> io::Result<Sample> {
        writeln!(self.asked.as_mut().expect("it is open"), "{calls}")?;
        let mut line = String::new();
        self.answers.read_line(&mut line)?;
        let told: Vec<f64> = line.split_whitespace().flat_map(str::parse).collect();
        match told[..] {
            [nanoseconds, faults] => Ok(Sample {
                nanoseconds,
                faults,
            }),
            _ => Err(io::Error::other("a worker ended without an answer")),
        }
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        drop(self.asked.take());
        let _ = self.process.wait(); // how it ended does not matter any more
    }
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    let middle = values.len() / 2;
    if values.len() % 2 == 1 {
        values[middle]
    } else {
        (values[middle - 1] + values[middle]) / 2.0
    }
}

/// Samples of each plan: in every turn one of each, in random order.
fn block(
    path: &str,
    plans: &[&str],
    size: Size,
    turns: usize,
    seed: usize,
) -> io::Result<Vec<Vec<Sample>>> {
    let start = |plan: &&str| Worker::start(path, plan, size, seed);
    let mut workers = plans.iter().map(start).collect::<io::Result<Vec<_>>>()?;
    let mut calls = 1;
    for worker in &mut workers {
        worker.sample(1)?; // prepares what is kept
        let once = worker.sample(1)?.nanoseconds;
        calls = calls.max((SAMPLE / once).ceil() as usize);
    }
    let mut random = Random::new(seed as u64);
    let mut order: Vec<usize> = (0..plans.len()).collect();
    let mut samples = vec![vec![]; plans.len()];
    for _ in 0..turns {
        random.shuffle(&mut order);
        for &i in &order {
            samples[i].push(workers[i].sample(calls)?);
        }
    }
    Ok(samples)
}

/// Ratios to `before` of each block, with `before` itself again as the control; and faults.
pub fn measure(path: &str, size: Size, blocks: usize, turns: usize) -> io::Result<Json> {
    let plans = ["before", "before", "shipped", "kept"];
    let names = ["before", "before again", "shipped", "kept"];
    let mut base = vec![];
    let mut ratios = vec![vec![]; plans.len()];
    let mut faults = vec![vec![]; plans.len()];
    for seed in 0..blocks {
        let samples = block(path, &plans, size, turns, seed)?;
        base.push(median(
            samples[0]
                .iter()
                .map(|sample| sample.nanoseconds / 1e6)
                .collect(),
        ));
        for (i, of_plan) in samples.iter().enumerate() {
            let paired = of_plan.iter().zip(&samples[0]);
            ratios[i].push(median(
                paired.map(|(a, b)| a.nanoseconds / b.nanoseconds).collect(),
            ));
            faults[i].push(median(of_plan.iter().map(|sample| sample.faults).collect()));
        }
    }
    let known = faults.iter().flatten().all(|count| count.is_finite());
    let faults = names
        .into_iter()
        .zip(faults.into_iter().map(median))
        .filter(|_| known);
    Ok(Json::object([
        ("milliseconds", Json::from(base)),
        (
            "ratios",
            Json::object(names.into_iter().zip(ratios).skip(1)),
        ),
        ("faults", Json::object(faults)),
    ]))
}
