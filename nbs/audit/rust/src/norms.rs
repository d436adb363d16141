//! A norm, computed or kept: nanoseconds of each way to come by it.

use std::hint::black_box;
use std::sync::atomic::Ordering::{Acquire, Relaxed};
use std::sync::atomic::{AtomicU32, AtomicU64, AtomicUsize};
use std::sync::{Barrier, Mutex, RwLock};
use std::thread;
use std::time::Instant;

use crate::json::Json;

const LENGTH: usize = 768;
const LANES: usize = 16;

/// Norm of a vector, one sum after the other.
fn plain(vector: &[f32]) -> f32 {
    vector.iter().map(|v| v * v).sum::<f32>().sqrt()
}

/// The same with sixteen sums side by side, which the compiler may put into vectors.
fn side_by_side(vector: &[f32]) -> f32 {
    let mut sums = [0.0; LANES];
    let chunks = vector.chunks_exact(LANES);
    let rest: f32 = chunks.remainder().iter().map(|v| v * v).sum();
    for chunk in chunks {
        for (sum, v) in sums.iter_mut().zip(chunk) {
            *sum += v * v;
        }
    }
    (sums.iter().sum::<f32>() + rest).sqrt()
}

/// A version in the low half and a value in the high half: whoever loads it has both of one time.
struct Packed {
    pair: AtomicU64,
    version: AtomicU32, // of what the value is computed from
}

impl Packed {
    fn new(value: f32) -> Self {
        let (version, bits) = (1, u64::from(value.to_bits()));
        Packed {
            pair: AtomicU64::new(bits << 32 | 1),
            version: AtomicU32::new(version),
        }
    }

    /// The value; None if something has changed since it was computed.
    fn get(&self) -> Option<f32> {
        let version = self.version.load(Acquire);
        let pair = self.pair.load(Acquire);
        (pair as u32 == version).then(|| f32::from_bits((pair >> 32) as u32))
    }
}

/// The same value in three kinds of cache.
struct Caches {
    mutex: Mutex<Option<f32>>,
    lock: RwLock<Option<f32>>,
    packed: Packed,
}

impl Caches {
    fn new(value: f32) -> Self {
        Caches {
            mutex: Mutex::new(Some(value)),
            lock: RwLock::new(Some(value)),
            packed: Packed::new(value),
        }
    }

    fn behind_mutex(&self) -> f32 {
        self.mutex.lock().unwrap().expect("a value is kept")
    }

    fn behind_lock(&self) -> f32 {
        self.lock.read().unwrap().expect("a value is kept")
    }

    fn in_one_atomic(&self) -> f32 {
        self.packed.get().expect("nothing has changed")
    }
}

/// Nanoseconds of a call, from `calls` of them.
fn nanoseconds(calls: usize, call: impl Fn() -> f32) -> f64 {
    let start = Instant::now();
    for _ in 0..calls {
        black_box(call());
    }
    start.elapsed().as_nanos() as f64 / calls as f64
}

/// Nanoseconds of a hit, in each of several threads that ask at the same time.
///
/// The first hits are not timed, so that the system has spread the threads over its cores, and
/// nobody stops asking before all have their time.
fn together(threads: usize, calls: usize, hit: impl Fn() -> f32 + Sync) -> f64 {
    let (barrier, ready, hit) = (Barrier::new(threads), AtomicUsize::new(0), &hit);
    let timed = || {
        barrier.wait();
        nanoseconds(calls, hit);
        let took = nanoseconds(calls, hit);
        ready.fetch_add(1, Relaxed);
        while ready.load(Relaxed) < threads {
            black_box(hit());
        }
        took
    };
    thread::scope(|scope| {
        let running: Vec<_> = (0..threads).map(|_| scope.spawn(timed)).collect();
        let times = running
            .into_iter()
            .map(|thread| thread.join().expect("no thread panics"));
        times.sum::<f64>() / threads as f64
    })
}

/// Samples by name: repeats in which everything takes a turn.
fn samples(repeats: usize, timed: &[(&str, &dyn Fn() -> f64)]) -> Json {
    let mut found = vec![vec![]; timed.len()];
    for repeat in 0..=repeats {
        for (samples, (_, time)) in found.iter_mut().zip(timed) {
            let sample = time();
            if repeat > 0 {
                samples.push(sample); // the first round only warms up
            }
        }
    }
    Json::object(timed.iter().map(|(name, _)| name).zip(found))
}

/// Everything of this file, measured. Threads need a longer run, so that they meet.
pub fn measure(repeats: usize, calls: usize) -> Json {
    let vector: Vec<f32> = (0..LENGTH).map(|i| (i as f32).sin()).collect();
    let vector = vector.as_slice();
    assert!((plain(vector) - side_by_side(vector)).abs() < 1e-4 * plain(vector));

    let s = -0.5_f32;
    let caches = Caches::new(plain(vector));
    let hits = [
        Caches::behind_mutex,
        Caches::behind_lock,
        Caches::in_one_atomic,
    ];
    assert!(hits.iter().all(|hit| hit(&caches) == plain(vector)));

    let alone: [(&str, &dyn Fn() -> f64); 7] = [
        ("nothing", &|| nanoseconds(calls, || black_box(s))),
        ("|s|", &|| nanoseconds(calls, || black_box(s).abs())),
        ("norm, plain sum", &|| {
            nanoseconds(calls, || plain(black_box(vector)))
        }),
        ("norm, sixteen sums", &|| {
            nanoseconds(calls, || side_by_side(black_box(vector)))
        }),
        ("Mutex", &|| {
            nanoseconds(calls, || black_box(&caches).behind_mutex())
        }),
        ("RwLock", &|| {
            nanoseconds(calls, || black_box(&caches).behind_lock())
        }),
        ("one atomic", &|| {
            nanoseconds(calls, || black_box(&caches).in_one_atomic())
        }),
    ];
    let shared = [1, 2, 4].map(|threads| {
        let timed: [(&str, &dyn Fn() -> f64); 3] = [
            ("Mutex", &|| {
                together(threads, 30 * calls, || black_box(&caches).behind_mutex())
            }),
            ("RwLock", &|| {
                together(threads, 30 * calls, || black_box(&caches).behind_lock())
            }),
            ("one atomic", &|| {
                together(threads, 30 * calls, || black_box(&caches).in_one_atomic())
            }),
        ];
        (threads, samples(repeats.div_ceil(2).max(6), &timed))
    });
    Json::object([
        ("alone", samples(repeats, &alone)),
        ("threads", Json::object(shared)),
    ])
}
