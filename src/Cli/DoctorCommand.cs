using MiniCpmNative.Engine;

namespace MiniCpmNative.Cli;

/// <summary>cpmx doctor</summary>
internal static class DoctorCommand
{
    private const string Usage = """
        usage: cpmx doctor

        Shows what this machine gives cpmx: the processor, the picture libraries, the CUDA driver,
        NVRTC, cuBLAS and the GPU, where each was found and in which version; then runs every
        operation on each device on made-up numbers and compares the results with the processor's
        in double precision. Exit code 1 when a device computes wrongly or cannot be used.
        """;

    public static int Run(string[] args, bool help, TextWriter output, Runners runners)
    {
        if (help)
        {
            output.WriteLine(Usage);
            return 0;
        }

        if (args.Length > 0) throw new InputException($"doctor takes no arguments, got {args[0]}");
        return runners.Diagnose(output) ? 0 : 1;
    }
}
