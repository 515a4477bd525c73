using System.Runtime.InteropServices;

namespace MiniCpmNative.Kernels.Cuda;

public enum CudaLibrary : byte
{
    Driver, Nvrtc, Cublas, CublasLt,
}

/// <summary>A library in memory; the indexer gives an entry point's address.</summary>
public sealed class LoadedLibrary(nint handle, string path)
{
    public string Path { get; } = path;

    /// <exception cref="CudaUnavailableException">The library has no such entry point.</exception>
    public nint this[string name] => NativeLibrary.TryGetExport(handle, name, out nint address)
        ? address
        : throw new CudaUnavailableException(
        $"cuda: {Path} has no entry point {name}: it is too old");
}

/// <summary>
/// Where CUDA's libraries may lie, in order: the directories of CPMX_CUDA_LIBRARIES, the system's
/// loader, $CUDA_HOME and $CUDA_PATH, /usr/local/cuda*, a conda environment, Python's nvidia
/// wheels, the WSL driver. Nothing is opened before it is asked for.
/// </summary>
public sealed class CudaSearch
{
    /// <summary>Directories to look in first, separated like PATH.</summary>
    public const string OverrideVariable = "CPMX_CUDA_LIBRARIES";

    private readonly Func<string, string?> _environment;
    private readonly bool _onlyOverride;

    /// <param name="environment">Reads an environment variable.</param>
    /// <param name="onlyOverride">Look nowhere but in the override's directories.</param>
    public CudaSearch(Func<string, string?>? environment = null, bool onlyOverride = false)
    {
        _environment = environment ?? Environment.GetEnvironmentVariable;
        _onlyOverride = onlyOverride;
    }

    /// <summary>File names of a library, newest first; a major version of 0 is any.</summary>
    public static string[] Names(CudaLibrary library, int major)
    {
        bool windows = OperatingSystem.IsWindows();
        return library switch
        {
            CudaLibrary.Driver => [windows ? "nvcuda.dll" : "libcuda.so.1"],
            CudaLibrary.Nvrtc => Versions(major, m => (windows, m) switch
            {
                (true, 11) => "nvrtc64_112_0.dll",
                (true, _) => $"nvrtc64_{m}0_0.dll",
                (_, 11) => "libnvrtc.so.11.2",
                _ => $"libnvrtc.so.{m}",
            }),
            CudaLibrary.Cublas =>
                Versions(major, m => windows ? $"cublas64_{m}.dll" : $"libcublas.so.{m}"),
            _ => Versions(major, m => windows ? $"cublasLt64_{m}.dll" : $"libcublasLt.so.{m}"),
        };
    }

    private static string[] Versions(int major, Func<int, string> name) =>
        major > 0 ? [name(major)] : [name(13), name(12), name(11)];

    /// <summary>Directories to look in, existing or not; null stands for the system's
    /// loader.</summary>
    public IEnumerable<string?> Places(CudaLibrary library)
    {
        string? own = _environment(OverrideVariable);
        if (!string.IsNullOrEmpty(own))
            foreach (string directory in own.Split(Path.PathSeparator,
                StringSplitOptions.RemoveEmptyEntries))
                yield return directory;
        if (_onlyOverride) yield break;
        yield return null;
        foreach (string variable in (string[])["CUDA_HOME", "CUDA_PATH"])
        {
            if (_environment(variable) is not { Length: > 0 } home) continue;
            yield return Path.Combine(home, OperatingSystem.IsWindows() ? "bin" : "lib64");
            yield return Path.Combine(home, "lib");
        }
        foreach (string home in Matching("/usr/local", "cuda*"))
            yield return Path.Combine(home, "lib64");
        if (_environment("CONDA_PREFIX") is { Length: > 0 } conda)
            yield return Path.Combine(conda, "lib");
        foreach (string packages in SitePackages())
        {
            yield return Path.Combine(packages, "nvidia", "cu13", "lib");
            yield return Path.Combine(packages, "nvidia", library == CudaLibrary.Nvrtc
                ? "cuda_nvrtc" : "cublas", "lib");
        }
        if (library == CudaLibrary.Driver) yield return "/usr/lib/wsl/lib";
    }

    private IEnumerable<string> SitePackages()
    {
        var roots = new List<string>();
        foreach (string variable in (string[])["VIRTUAL_ENV", "CONDA_PREFIX"])
            if (_environment(variable) is { Length: > 0 } root)
                roots.Add(Path.Combine(root, "lib"));
        if (_environment("HOME") is { Length: > 0 } home)
            roots.Add(Path.Combine(home, ".local", "lib"));
        roots.Add("/usr/local/lib");
        foreach (string root in roots)
        {
            foreach (string python in Matching(root, "python3*"))
            {
                yield return Path.Combine(python, "site-packages");
                yield return Path.Combine(python, "dist-packages");
            }
        }
    }

    private static IEnumerable<string> Matching(string directory, string pattern)
    {
        try
        {
            return [.. Directory.GetDirectories(directory, pattern)
                .OrderDescending(StringComparer.Ordinal)];
        }
        catch (Exception e) when (e is IOException or UnauthorizedAccessException)
        {
            return [];
        }
    }

    /// <summary>Opens the first of the library's names that any place has.</summary>
    /// <exception cref="CudaUnavailableException">Says what was looked for and where.</exception>
    public LoadedLibrary Open(CudaLibrary library, int major)
    {
        string[] names = Names(library, major);
        var places = new List<string>();
        string damaged = "";
        foreach (string? place in Places(library))
        {
            if (place != null && !Directory.Exists(place)) continue;
            places.Add(place ?? "the system's library path");
            foreach (string name in names)
            {
                string path = place == null ? name : Path.Combine(place, name);
                if (place != null && !File.Exists(path)) continue;
                string? file = place == null ? ElfFile.OfSystem(name, _environment) : path;
                if (file is not null && ElfFile.Fault(file) is { } fault)
                {
                    damaged += $"; {file} {fault}";
                    continue;
                }

                try
                {
                    return new(NativeLibrary.Load(path), place == null ? Located(name) : path);
                }
                catch (Exception e) when (e is DllNotFoundException or BadImageFormatException)
                {
                    if (file is not null)
                        damaged += $"; {file} is there but cannot be loaded: {Reason(e)}";
                }
            }
        }
        string what = library switch
        {
            CudaLibrary.Driver => "driver",
            CudaLibrary.Nvrtc => "NVRTC",
            _ => "cuBLAS",
        };
        string advice = library == CudaLibrary.Driver
            ? "install the NVIDIA driver"
            : $"install the CUDA toolkit's libraries or name their directory in {OverrideVariable}";
        if (damaged.Length > 0) advice = "install it anew";
        throw new CudaUnavailableException(
            $"cuda: {what} {(damaged.Length > 0 ? "cannot be used" : "not found")}: looked for "
                + $"{string.Join(", ", names)} in " +
            $"{(places.Count == 0 ? "no directory" : string.Join(", ", places))}{damaged}; "
                + $"{advice}");
    }

    // The loader's own words, the last of the runtime's many lines.
    private static string Reason(Exception failure) => failure.Message
        .Split('\n', StringSplitOptions.RemoveEmptyEntries | StringSplitOptions.TrimEntries)
        .Where(line => line.Contains(": ", StringComparison.Ordinal))
        .Select(line => line[(line.IndexOf(": ", StringComparison.Ordinal) + 2)..])
        .FirstOrDefault() ?? failure.Message.ReplaceLineEndings(" ");

    // The full path behind a name that the system's loader resolved, where the system tells.
    private static string Located(string name)
    {
        if (!OperatingSystem.IsLinux()) return name;
        try
        {
            foreach (string line in File.ReadLines("/proc/self/maps"))
            {
                int slash = line.IndexOf('/');
                if (slash > 0
                    && Path.GetFileName(line[slash..]).StartsWith(name, StringComparison.Ordinal))
                    return line[slash..];
            }
        }
        catch (IOException)
        {
        }
        return name;
    }
}
