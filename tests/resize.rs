//! Other sizes for a disk: against a flat array, with QEMU resizing and writing in turn; over backing files that are
//! longer and shorter, with snapshots, sizes aligned to nothing.

mod qemu;

use std::path::Path;
use std::sync::Arc;

use qcow2::error::{BitmapProblem, Error};
use qcow2::image::{CreateOptions, Image, OpenOptions, Preallocation, ResizeOptions, ZeroFlags, create};
use qcow2::storage::sim::Rng;

/// A kind of image.
#[derive(Debug, Clone)]
struct Shape {
    settings: &'static [(&'static str, &'static str)],
    /// Length of the backing file.
    below: Option<u64>,
    /// Sizes are random up to this.
    size_max: u64,
    snapshots: bool,
}

fn shapes() -> Vec<Shape> {
    let shape = |settings, below, size_max, snapshots| Shape { settings, below, size_max, snapshots };
    vec![
        shape(&[], None, 3 << 20, false),
        shape(&[("cluster_size", "512")], None, 300_000, true),
        shape(&[("cluster_size", "512"), ("refcount_bits", "64")], Some(150_000), 300_000, false),
        shape(&[("cluster_size", "4k"), ("refcount_bits", "1")], Some(1 << 20), 5 << 20, false),
        shape(&[("cluster_size", "4k")], Some(10 << 20), 5 << 20, true),
        shape(&[("extended_l2", "on")], None, 3 << 20, true),
        shape(&[("extended_l2", "on"), ("cluster_size", "16k")], Some(30 << 20), 20 << 20, false),
        shape(&[("extended_l2", "on"), ("cluster_size", "16k")], Some(700_000), 20 << 20, true),
        shape(&[("compat", "0.10"), ("cluster_size", "4k")], None, 5 << 20, false),
        shape(&[("compat", "0.10")], Some(100), 3 << 20, false),
        shape(&[("cluster_size", "2M")], Some(9 << 20), 20 << 20, false),
    ]
}

fn open(path: &str, tiny: bool) -> Image {
    let mut options = OpenOptions::default();
    options.set("backing", "any").unwrap();
    if tiny {
        (options.l2_cache_size, options.refcount_cache_size) = (4096, 4096);
    }
    Image::open(Path::new(path), &options).unwrap_or_else(|e| panic!("{path}: {e}"))
}

fn make(path: &str, shape: &Shape, dir: &qemu::Dir, size: u64) -> Vec<u8> {
    let mut options = CreateOptions::default();
    shape.settings.iter().for_each(|(key, value)| options.set(key, value).unwrap());
    let mut content = Vec::new();
    if let Some(length) = shape.below {
        let base = dir.path("base.raw");
        content = (0..length).map(|i| 0x80 | (i / 512) as u8).collect();
        std::fs::write(&base, &content).unwrap();
        options.set("backing_file", &base).unwrap();
        options.set("backing_fmt", "raw").unwrap();
    }
    create(Path::new(path), size, &options, false).unwrap();
    content.resize(size as usize, 0);
    content
}

const SHRINK: ResizeOptions = ResizeOptions { allow_shrink: true, preallocation: Preallocation::Off };

fn some_size(rng: &mut Rng, shape: &Shape, now: u64) -> u64 {
    let size = match rng.below(4) {
        0 => now.saturating_sub(rng.below(5000)),
        1 => now + rng.below(5000),
        2 => rng.below(shape.size_max) / 65536 * 65536,
        _ => rng.below(shape.size_max),
    };
    size.min(shape.size_max)
}

/// One random run; every third resize is QEMU's.
fn run(shape: &Shape, dir: &qemu::Dir, seed: u64) {
    let mut rng = Rng::new(seed);
    let label = format!("{shape:?}, seed {seed}");
    let path = dir.path(&format!("image-{seed}"));
    let mut content = make(&path, shape, dir, (1 + rng.below(shape.size_max)).next_multiple_of(512));
    let tiny = rng.one_in(2);
    let mut image = open(&path, tiny);
    let mut snapshots: Vec<(String, Vec<u8>)> = Vec::new();
    for op in 0..60 {
        let place = || format!("{label}, op {op}");
        let size = content.len() as u64;
        match rng.below(12) {
            0..=3 => {
                let new = some_size(&mut rng, shape, size);
                let modes = [Preallocation::Metadata, Preallocation::Falloc, Preallocation::Full];
                let mode = if new > size && rng.one_in(3) { modes[rng.below(3) as usize] } else { Preallocation::Off };
                let options = ResizeOptions { preallocation: mode, ..SHRINK };
                image.resize(new, options, None).unwrap_or_else(|e| panic!("{}: {size} to {new}: {e}", place()));
                content.resize(new.next_multiple_of(512) as usize, 0);
                assert_eq!(image.size(), content.len() as u64, "{}", place());
            }
            4 => {
                image.close().unwrap();
                qemu::check(&path, false);
                let new = some_size(&mut rng, shape, size).next_multiple_of(512).max(512);
                // What QEMU leaves behind a smaller end in the middle of a cluster shows up when it grows again; it has
                // nothing to leave there if the end is aligned. Over a longer backing file it writes zeroes itself.
                let aligned = new.next_multiple_of(2 << 20);
                let new = if new < size { aligned } else { new };
                if new < size || new > size && snapshots.is_empty() {
                    qemu::img(&["resize", "-q", "-f", "qcow2", "--shrink", &path, &new.to_string()]);
                    content.resize(new as usize, 0);
                }
                image = open(&path, tiny);
            }
            5 if shape.snapshots && snapshots.len() < 3 => {
                image.close().unwrap();
                let name = format!("s{}", snapshots.len());
                qemu::img(&["snapshot", "-c", &name, &path]);
                snapshots.push((name, content.clone()));
                image = open(&path, tiny);
            }
            6 if size > 0 => {
                let at = rng.below(size);
                let n = 1 + rng.below((size - at).min(300_000));
                image.discard(at, n).unwrap();
                let mut seen = vec![0; n as usize];
                image.pread(&mut seen, at).unwrap();
                let old = &mut content[at as usize..(at + n) as usize];
                assert!(seen.iter().zip(old.iter()).all(|(seen, old)| seen == old || *seen == 0), "{}", place());
                old.copy_from_slice(&seen);
            }
            7 if size > 0 => {
                let at = rng.below(size);
                let n = 1 + rng.below((size - at).min(300_000));
                image.write_zeroes(at, n, ZeroFlags { may_unmap: rng.one_in(2), ..Default::default() }).unwrap();
                content[at as usize..(at + n) as usize].fill(0);
            }
            8 => image.flush().unwrap(),
            _ if size > 0 => {
                // Half of them at the end, which is where it matters.
                let at = if rng.one_in(2) { rng.below(size) } else { size - 1 - rng.below(size.min(100_000)) };
                let n = 1 + rng.below((size - at).min(100_000));
                let data: Vec<u8> = (0..n).map(|i| (op + i / 512) as u8 | 1).collect();
                image.pwrite(&data, at).unwrap();
                content[at as usize..(at + n) as usize].copy_from_slice(&data);
            }
            _ => {}
        }
        let mut seen = vec![0x55; content.len()];
        image.pread(&mut seen, 0).unwrap_or_else(|e| panic!("{}: {e}", place()));
        let wrong = seen.iter().zip(&content).position(|(a, b)| a != b);
        assert_eq!(wrong, None, "{} of {} bytes", place(), content.len());
    }
    image.close().unwrap();
    qemu::check(&path, false);
    let raw = dir.path("raw");
    std::fs::write(&raw, &content).unwrap();
    qemu::img(&["compare", "-q", "-f", "qcow2", "-F", "raw", &path, &raw]);
    for (name, content) in &snapshots {
        qemu::img(&["snapshot", "-a", name, &path]);
        std::fs::write(&raw, content).unwrap();
        qemu::img(&["compare", "-q", "-f", "qcow2", "-F", "raw", &path, &raw]);
    }
    let used: u64 = qemu::img(&["check", "-f", "qcow2", "--output=json", &path])
        .lines()
        .find_map(|line| {
            line.trim().strip_prefix("\"image-end-offset\": ").map(|n| n.trim_end_matches(',').parse().unwrap())
        })
        .unwrap();
    // QEMU applied the snapshots; without them the file ends where its last cluster does.
    let length = std::fs::metadata(&path).unwrap().len();
    assert!(!snapshots.is_empty() || length <= used, "{label}: {length} bytes, of which {used} are in use");
    std::fs::remove_file(&path).unwrap();
}

#[test]
fn random_sizes_against_a_flat_array() {
    let Some(dir) = qemu::dir("resize-random") else { return };
    let runs = std::env::var("RESIZE_RUNS").map_or(1, |text| text.parse().unwrap());
    let first: u64 = std::env::var("RESIZE_SEED").map_or(1, |text| text.parse().unwrap());
    for shape in shapes() {
        for seed in first..first + runs {
            run(&shape, &dir, seed);
        }
    }
}

/// Scenarios L, M and N, and their like with standard clusters.
#[test]
fn growing_with_preallocation_as_the_scenarios_say() {
    let Some(dir) = qemu::dir("resize-scenarios") else { return };
    let base = dir.path("base.raw");
    std::fs::write(&base, vec![0xff; 1 << 20]).unwrap();
    for mode in ["metadata", "falloc", "full"] {
        for (name, extended, backing, ahead, from, to) in [
            ("L", true, true, true, 512 << 10, 1 << 20),
            ("M", true, true, false, 503 << 10, 1013 << 10),
            ("N", true, false, false, 503 << 10, 1013 << 10),
            ("M, standard clusters", false, true, false, 503 << 10, 1013 << 10),
            ("N, standard clusters", false, false, false, 503 << 10, 1013 << 10),
        ] {
            let label = format!("{name}, {mode}");
            let path = dir.path("image");
            let mut options = CreateOptions { extended_l2: extended, ..Default::default() };
            if backing {
                options.set("backing_file", &base).unwrap();
                options.set("backing_fmt", "raw").unwrap();
            }
            if ahead {
                options.set("preallocation", mode).unwrap();
            }
            create(Path::new(&path), from, &options, true).unwrap();
            let image = open(&path, false);
            if !backing {
                image.pwrite(&vec![0xff; from as usize], 0).unwrap();
            }
            let mut options = ResizeOptions::default();
            if !ahead {
                options.preallocation = Preallocation::from_name(mode).unwrap();
            }
            image.resize(to, options, None).unwrap();
            let mut content = vec![0xff; from as usize];
            content.resize(to as usize, 0);
            let mut seen = vec![1; to as usize];
            image.pread(&mut seen, 0).unwrap();
            assert!(seen == content, "{label}");
            let before = image.stats().clusters_allocated;
            if !ahead {
                image.pwrite(&[7; 4096], 700 << 10).unwrap();
                assert_eq!(image.stats().clusters_allocated, before, "{label}: the new area has its clusters");
                image.pwrite(&[0; 4096], 700 << 10).unwrap();
            }
            image.close().unwrap();
            qemu::check(&path, false);
            let raw = dir.path("raw");
            std::fs::write(&raw, &content).unwrap();
            qemu::img(&["compare", "-q", "-f", "qcow2", "-F", "raw", &path, &raw]);
            let occupied = open(&path, false).storage().allocated_bytes().unwrap();
            assert!(mode == "metadata" || ahead || occupied >= to - from, "{label}: {occupied} bytes on disk");
        }
    }
}

#[test]
fn what_cannot_be_resized_says_why_and_stays() {
    let Some(dir) = qemu::dir("resize-refused") else { return };
    let path = dir.path("image");
    let make = |settings: &[(&str, &str)]| {
        let mut options = CreateOptions::default();
        settings.iter().for_each(|(key, value)| options.set(key, value).unwrap());
        create(Path::new(&path), 1 << 20, &options, true).unwrap();
    };
    make(&[]);
    let before = std::fs::read(&path).unwrap();
    let image = open(&path, false);
    let refused = |size, options| image.resize(size, options, None).unwrap_err();
    let e = refused(1000, ResizeOptions::default());
    assert!(matches!(e, Error::Argument { name: "size", .. }) && e.to_string().contains("shrinking"), "{e}");
    let e = refused(1000, ResizeOptions { preallocation: Preallocation::Full, ..SHRINK });
    assert!(matches!(e, Error::Argument { name: "preallocation", .. }), "{e}");
    assert!(matches!(refused(u64::MAX, SHRINK), Error::TooLarge { .. }));
    image.resize(1 << 20, ResizeOptions::default(), None).unwrap();
    assert_eq!(image.size(), 1 << 20);
    image.close().unwrap();
    assert!(std::fs::read(&path).unwrap() == before);

    make(&[("compat", "0.10")]);
    qemu::img(&["snapshot", "-c", "s", &path]);
    let e = open(&path, false).resize(2 << 20, SHRINK, None).unwrap_err();
    assert!(matches!(&e, Error::Unsupported { feature } if feature.contains("snapshots")), "{e}");

    make(&[]);
    qemu::img(&["bitmap", "--add", "-f", "qcow2", "-g", "512", &path, "b"]);
    let before = std::fs::read(&path).unwrap();
    let image = open(&path, false);
    for (size, why) in [(0, "a disk of 0 bytes"), ((2 << 40) + 512, "larger than 512 MiB")] {
        let e = image.resize(size, SHRINK, None).unwrap_err();
        assert!(matches!(&e, Error::Bitmap { name, .. } if name == "b") && e.to_string().contains(why), "{e}");
    }
    // Somebody else has marked it, and did not come back.
    image.close().unwrap();
    assert!(std::fs::read(&path).unwrap() == before);
    let image = open(&path, false);
    image.pwrite(&[1; 512], 0).unwrap();
    image.flush().unwrap();
    image.poison("killed by the test");
    drop(image);
    let e = open(&path, false).resize(2 << 20, SHRINK, None).unwrap_err();
    assert!(matches!(&e, Error::Bitmap { problem: BitmapProblem::Inconsistent, .. }), "{e}");
    assert!(qemu::img(&["info", "-f", "qcow2", &path]).contains("in-use"), "refused, and changed");

    let base = dir.path("base.raw");
    std::fs::write(&base, vec![0xff; 2 << 20]).unwrap();
    make(&[("compat", "0.10"), ("backing_file", &base), ("backing_fmt", "raw")]);
    let image = open(&path, false);
    let e = image.resize(2 << 20, SHRINK, None).unwrap_err();
    assert!(matches!(&e, Error::Unsupported { feature } if feature.contains("zero flag")), "{e}");
    image.resize(1 << 19, SHRINK, None).unwrap();
    image.close().unwrap();
    qemu::check(&path, false);

    let options = OpenOptions { read_only: true, ..Default::default() };
    make(&[]);
    let image = Image::open(Path::new(&path), &options).unwrap();
    assert!(matches!(image.resize(2 << 20, SHRINK, None), Err(Error::ReadOnly)));
}

#[test]
fn a_cancelled_resize_leaves_the_old_size_and_no_leak() {
    let Some(dir) = qemu::dir("resize-cancel") else { return };
    let path = dir.path("image");
    for (settings, mode) in
        [("off", Preallocation::Metadata), ("on", Preallocation::Falloc), ("on", Preallocation::Full)]
    {
        let mut options = CreateOptions { cluster_size_bytes: 16 << 10, ..Default::default() };
        options.set("extended_l2", settings).unwrap();
        create(Path::new(&path), 1 << 20, &options, true).unwrap();
        let image = open(&path, false);
        image.pwrite(&[7; 1 << 20], 0).unwrap();
        image.close().unwrap(); // the file is no longer than it has to be now
        let image = open(&path, false);
        let length = || std::fs::metadata(&path).unwrap().len();
        let before = length();
        for stop_at in [0, 1, 20 << 20] {
            let tell = |done: u64, total: u64| {
                assert!(done <= total && total == 63 << 20);
                done < stop_at
            };
            let options = ResizeOptions { preallocation: mode, ..Default::default() };
            assert_eq!(image.resize(64 << 20, options, Some(&tell)), Err(Error::Cancelled));
            assert_eq!((image.size(), length()), (1 << 20, before), "{mode:?}, stopped at {stop_at}");
        }
        let calls = std::cell::Cell::new(0);
        let count = |_, _| {
            calls.set(calls.get() + 1);
            calls.get() < 2
        };
        assert_eq!(image.resize(1000, SHRINK, Some(&count)), Err(Error::Cancelled));
        let mut seen = vec![0; 1 << 20];
        image.pread(&mut seen, 0).unwrap();
        assert!(seen == [7; 1 << 20]);
        image.close().unwrap();
        qemu::check(&path, false);
    }
}

/// An L1 table that moves is written in pieces of 1 MiB: what lies behind the first arrives as well, and at its place.
#[test]
fn an_l1_table_of_several_pieces_moves_as_a_whole() {
    use qcow2::storage::memory::MemoryStorage;
    use qcow2::storage::{Blocking, IoSrc, Storage};
    let storage = Arc::new(MemoryStorage::default());
    // A table maps 32 KiB, so that a piece of the L1 table maps 4 GiB.
    let options = CreateOptions { cluster_size_bytes: 512, ..CreateOptions::default() };
    let (size, piece) = (9u64 << 30, 4u64 << 30);
    qcow2::wait::block_on(qcow2::image::create_with(&Blocking, &*storage, size, &options)).unwrap();
    // What lies past the end is no zeroes yet, wherever the table goes.
    storage.write(&[IoSrc::from(&vec![0xff; 16 << 20][..])], storage.size().unwrap()).unwrap();
    let places: Vec<u64> =
        [0, 1, 2].iter().flat_map(|n| [n * piece, n * piece + (32 << 10), n * piece + (900 << 20)]).collect();
    let check = |image: &Image, step: &str| {
        for (&at, value) in places.iter().zip(1..) {
            let mut seen = [0; 1024];
            image.pread(&mut seen, at - at.min(512)).unwrap();
            assert_eq!(seen[at.min(512) as usize..][..512], [value; 512], "{step}: at {at:#x}");
        }
    };
    let open = || Image::open_storage(storage.clone(), &OpenOptions::default()).unwrap();
    let image = open();
    places.iter().zip(1..).for_each(|(&at, value)| image.pwrite(&[value; 512], at).unwrap());
    check(&image, "as written");
    for (size, step) in [(11 << 30, "longer"), (10 << 30, "shorter"), (13 << 30, "longer again")] {
        image.resize(size, ResizeOptions { allow_shrink: true, ..ResizeOptions::default() }, None).unwrap();
        check(&image, step);
        let result = image.check(&mut Default::default()).unwrap();
        assert!(result.is_sound() && result.leaks == 0, "{step}: {result:?}");
        let mut end = [1; 512];
        image.pread(&mut end, size - 512).unwrap();
        assert_eq!(end, [0; 512], "{step}");
        let reader = OpenOptions { read_only: true, ..OpenOptions::default() };
        image.flush().unwrap();
        check(&Image::open_storage(storage.clone(), &reader).unwrap(), step);
    }
    image.close().unwrap();
    check(&open(), "opened again");
}
