//! Tells the program which compiler made it, and which crates went into it.

use std::env;
use std::fs;
use std::process::Command;

fn main() {
    let lock = fs::read_to_string("Cargo.lock").expect("cargo has written Cargo.lock");
    for (name, variable) in [("ndarray", "NDARRAY"), ("matrixmultiply", "MATRIXMULTIPLY")] {
        println!(
            "cargo:rustc-env=VERSION_{variable}={}",
            version(&lock, name)
        );
    }
    let rustc = env::var("RUSTC").expect("cargo names the compiler");
    let told = Command::new(rustc)
        .arg("--version")
        .output()
        .expect("the compiler runs");
    let told = String::from_utf8(told.stdout).expect("a version is text");
    println!(
        "cargo:rustc-env=VERSION_RUSTC={}",
        told.trim().trim_start_matches("rustc ")
    );
    println!("cargo:rerun-if-changed=Cargo.lock");
}

/// The version of a package in the text of Cargo.lock.
fn version<'a>(lock: &'a str, name: &str) -> &'a str {
    let entry = format!("name = \"{name}\"\nversion = \"");
    let start = lock.find(&entry).expect("the crate is in Cargo.lock") + entry.len();
    lock[start..]
        .split('"')
        .next()
        .expect("a version ends with a quote")
}
