// run_expert.cpp in Rust, by FFI signatures written by hand from globe.h.
use std::ffi::{c_char, c_void, CStr, CString};
use std::ptr::{null, null_mut};

#[repr(C)]
struct Matrix {
    data: *const c_void,
    rows: i64,
    cols: i64,
    stride: i64,
    dtype: i32,
}

#[repr(C)]
struct Options {
    activation: i32,
    threads: i32,
    workspace: *mut c_void,
    workspace_bytes: usize,
    cache: *mut c_void,
}

#[link(name = "globe")]
extern "C" {
    fn globe_last_error() -> *const c_char;
    fn globe_open(directory: *const c_char, out: *mut *mut c_void) -> i32;
    fn globe_close(checkpoint: *mut c_void);
    fn globe_layers(checkpoint: *const c_void, layers: *mut *const i64, count: *mut i64) -> i32;
    fn globe_hidden_size(checkpoint: *const c_void, size: *mut i64) -> i32;
    fn globe_experts(checkpoint: *const c_void, layer: i64, count: *mut i64) -> i32;
    fn globe_expert_workspace(checkpoint: *const c_void, tokens: i64, threads: i32, bytes: *mut usize) -> i32;
    fn globe_expert_forward(
        checkpoint: *const c_void,
        layer: i64,
        expert: i64,
        tokens: *const Matrix,
        out: *const Matrix,
        options: *const Options,
    ) -> i32;
}

fn done(status: i32) {
    if status != 0 {
        let message = unsafe { CStr::from_ptr(globe_last_error()) };
        eprintln!("libglobe: error: {}", message.to_string_lossy());
        std::process::exit(1);
    }
}

fn main() {
    let arguments: Vec<String> = std::env::args().collect();
    let directory = CString::new(arguments[1].as_str()).unwrap();
    let raw = std::fs::read(&arguments[2]).unwrap();
    let tokens: Vec<f32> = raw.chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect();
    let mut made = vec![0f32; tokens.len()];
    let mut result: Vec<u8> = Vec::new();
    unsafe {
        let mut checkpoint = null_mut();
        done(globe_open(directory.as_ptr(), &mut checkpoint));
        let (mut layers, mut count, mut width, mut bytes) = (null(), 0i64, 0i64, 0usize);
        done(globe_layers(checkpoint, &mut layers, &mut count));
        done(globe_hidden_size(checkpoint, &mut width));
        let rows = tokens.len() as i64 / width;
        done(globe_expert_workspace(checkpoint, rows, 0, &mut bytes));
        let mut workspace = vec![0u8; bytes];
        let given = Matrix { data: tokens.as_ptr().cast(), rows, cols: width, stride: 0, dtype: 0 };
        let taken = Matrix { data: made.as_mut_ptr().cast(), rows, cols: width, stride: 0, dtype: 0 };
        let options = Options {
            activation: 0,
            threads: 0,
            workspace: workspace.as_mut_ptr().cast(),
            workspace_bytes: bytes,
            cache: null_mut(),
        };
        for &layer in std::slice::from_raw_parts(layers, count as usize) {
            let mut experts = 0i64;
            done(globe_experts(checkpoint, layer, &mut experts));
            for expert in 0..experts {
                done(globe_expert_forward(checkpoint, layer, expert, &given, &taken, &options));
                result.extend(made.iter().flat_map(|x| x.to_le_bytes()));
            }
        }
        globe_close(checkpoint);
    }
    std::fs::write(&arguments[3], result).unwrap();
}
