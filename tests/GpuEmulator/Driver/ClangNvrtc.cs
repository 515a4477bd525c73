using System.Diagnostics;
using System.Reflection;
using System.Runtime.InteropServices;
using System.Text;
using MiniCpmNative.Kernels.Cuda;

namespace MiniCpmNative.GpuEmulator.Driver;

/// <summary>
/// NVRTC's table on top of clang's CUDA front end: a second compiler for the same sources, and the
/// only one where NVRTC cannot be installed. clang has no CUDA headers here, so a prelude declares
/// the built-ins that NVRTC knows; math functions go to approximations exact enough for tests.
/// </summary>
public static unsafe class ClangNvrtc
{
    private sealed class Compilation
    {
        public string Source = "", Name = "", Log = "";
        public byte[] Ptx = [];
    }

    private const string Hopper = "90a";

    private static readonly List<Compilation> s_programs = [];
    private static readonly Lock s_gate = new();
    private static byte* s_error;

    /// <summary>The clang found on this machine, or null.</summary>
    public static string? Clang { get; } =
        Find("clang-14", "clang-15", "clang-16", "clang-17", "clang-18", "clang-19", "clang");

    /// <summary>One that knows sm_90a, or null.</summary>
    public static string? HopperClang { get; } = Find("clang-19", "clang-18");

    public static NvrtcApi Table() => new()
    {
        Path = Clang ?? "",
        Version = &Version,
        CreateProgram = &CreateProgram,
        CompileProgram = &CompileProgram,
        DestroyProgram = &DestroyProgram,
        GetPtxSize = &GetPtxSize,
        GetPtx = &GetPtx,
        GetCubinSize = &GetPtxSize,
        GetCubin = &GetPtx,
        GetLogSize = &GetLogSize,
        GetLog = &GetLog,
        GetErrorString = &GetErrorString,
        GetNumSupportedArchs = &GetNumSupportedArchs,
        GetSupportedArchs = &GetSupportedArchs,
    };

    private static string? Find(params string[] names) => names
        .SelectMany(name => (Environment.GetEnvironmentVariable("PATH") ?? "")
            .Split(Path.PathSeparator)
            .Select(directory => Path.Combine(directory, name)))
        .FirstOrDefault(File.Exists);

    [UnmanagedCallersOnly]
    private static int Version(int* major, int* minor)
    {
        (*major, *minor) = (0, 14);
        return 0;
    }

    [UnmanagedCallersOnly]
    private static int CreateProgram(nint* program, byte* source, byte* name, int headers,
        byte** texts, byte** names)
    {
        lock (s_gate)
        {
            s_programs.Add(new()
            {
                Source = Marshal.PtrToStringUTF8((nint)source) ?? "",
                Name = Marshal.PtrToStringUTF8((nint)name) ?? "source.cu",
            });
            *program = s_programs.Count;
        }
        return 0;
    }

    [UnmanagedCallersOnly]
    private static int DestroyProgram(nint* program)
    {
        lock (s_gate) s_programs[(int)*program - 1] = new();
        return 0;
    }

    [UnmanagedCallersOnly]
    private static int CompileProgram(nint program, int count, byte** options)
    {
        Compilation compilation;
        lock (s_gate) compilation = s_programs[(int)program - 1];
        var arguments = new List<string>();
        for (int n = 0; n < count; n++)
            Translate(Marshal.PtrToStringUTF8((nint)options[n]) ?? "", arguments);
        try
        {
            Run(compilation, arguments);
        }
        catch (Exception e) when (e is IOException or System.ComponentModel.Win32Exception)
        {
            compilation.Log = e.Message;
        }
        return compilation.Ptx.Length > 0 ? 0 : 6; // NVRTC_ERROR_COMPILATION
    }

    private static void Translate(string option, List<string> into)
    {
        if (option.StartsWith("--gpu-architecture=", StringComparison.Ordinal))
        {
            // clang 14 knows up to sm_86; newer devices run older PTX.
            string architecture = option[(option.IndexOf('_') + 1)..];
            bool known = architecture == Hopper || int.Parse(architecture) <= 86;
            into.Add($"--cuda-gpu-arch=sm_{(known ? architecture : "86")}");
        }
        else if (option == "-lineinfo") into.Add("-gline-tables-only");
        else if (option == "--use_fast_math") into.Add("-fcuda-flush-denormals-to-zero");
        else into.Add(option);
    }

    private static void Run(Compilation compilation, List<string> arguments)
    {
        string folder = Directory.CreateTempSubdirectory("cpmx-clang").FullName;
        try
        {
            string prelude = Path.Combine(folder, "prelude.h"),
                source = Path.Combine(folder, compilation.Name);
            string output = Path.Combine(folder, "out.ptx");
            File.WriteAllText(prelude, Prelude());
            File.WriteAllText(source, compilation.Source);
            bool hopper = arguments.Any(a => a.EndsWith(Hopper, StringComparison.Ordinal));
            var start = new ProcessStartInfo((hopper ? HopperClang : Clang) ?? "clang")
            {
                RedirectStandardError = true,
            };
            foreach (string argument in (string[])["-x", "cuda", "--cuda-device-only", "-nocudainc",
                "-nocudalib", "-fdeclspec",
                "-Wno-unknown-cuda-version", "-Wno-pass-failed", "-O2", "-ffp-contract=fast", "-S",
                "-include", prelude,
                "-Xclang", "-target-feature", "-Xclang", hopper ? "+ptx80" : "+ptx71", .. arguments, source, "-o",
                output])
                start.ArgumentList.Add(argument);
            using var process = Process.Start(start)!;
            compilation.Log = process.StandardError.ReadToEnd();
            process.WaitForExit();
            if (process.ExitCode == 0) compilation.Ptx = [.. File.ReadAllBytes(output), 0];
        }
        finally
        {
            Directory.Delete(folder, recursive: true);
        }
    }

    private static string Prelude()
    {
        using var stream = Assembly.GetExecutingAssembly()
            .GetManifestResourceStream("clang-prelude.h")!;
        return new StreamReader(stream).ReadToEnd();
    }

    [UnmanagedCallersOnly]
    private static int GetPtxSize(nint program, nuint* size)
    {
        lock (s_gate) *size = (nuint)s_programs[(int)program - 1].Ptx.Length;
        return 0;
    }

    [UnmanagedCallersOnly]
    private static int GetPtx(nint program, byte* to)
    {
        lock (s_gate)
            Marshal.Copy(s_programs[(int)program - 1].Ptx, 0, (nint)to,
            s_programs[(int)program - 1].Ptx.Length);
        return 0;
    }

    [UnmanagedCallersOnly]
    private static int GetLogSize(nint program, nuint* size)
    {
        lock (s_gate)
            *size = (nuint)Encoding.UTF8.GetByteCount(s_programs[(int)program - 1].Log) + 1;
        return 0;
    }

    [UnmanagedCallersOnly]
    private static int GetLog(nint program, byte* to)
    {
        byte[] log;
        lock (s_gate) log = Encoding.UTF8.GetBytes(s_programs[(int)program - 1].Log + "\0");
        Marshal.Copy(log, 0, (nint)to, log.Length);
        return 0;
    }

    [UnmanagedCallersOnly]
    private static byte* GetErrorString(int result)
    {
        if (s_error == null)
            s_error = (byte*)Marshal.StringToCoTaskMemUTF8("clang cannot compile this");
        return s_error;
    }

    [UnmanagedCallersOnly]
    private static int GetNumSupportedArchs(int* count)
    {
        *count = 2;
        return 0;
    }

    [UnmanagedCallersOnly]
    private static int GetSupportedArchs(int* known)
    {
        (known[0], known[1]) = (80, 86);
        return 0;
    }
}
