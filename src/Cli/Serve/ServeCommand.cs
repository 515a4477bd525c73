using System.Diagnostics;
using System.Globalization;
using System.Net;
using System.Runtime.InteropServices;
using MiniCpmNative.Engine;
using MiniCpmNative.Engine.Config;
using MiniCpmNative.Engine.Generate;

namespace MiniCpmNative.Cli.Serve;

/// <summary>cpmx serve MODEL [--adapter DIR] ...</summary>
internal static class ServeCommand
{
    private const string KeyVariable = "CPMX_API_KEY";

    private const string Usage = """
        usage: cpmx serve MODEL [--adapter DIR] [--port N] [--host ADDRESS] [--api_key KEY]
                          [--name value ...]

        Serves a model, with an adapter that cpmx or PEFT wrote, to this machine: OpenAI's
        /v1/models and /v1/chat/completions (streamed or not, functions, pictures and videos as data:
        URLs), and a page at / that asks it, beside the model without the adapter. Ctrl-C or SIGTERM
        end it when what runs is answered, a second one at once.

          --adapter DIR    folder with adapter_config.json and adapter_model.safetensors
          --name NAME      the model's name in requests; its folder's (NAME:base: without adapter)
          --port N         8080; 0 takes a free one
          --host ADDRESS   127.0.0.1; another one needs a key
          --api_key KEY    what requests must carry, "Authorization: Bearer KEY"; else $CPMX_API_KEY
          --batch N        answers at once (8)
          --max_waiting N  requests that may wait (64); more are answered with status 429
          --max_body SIZE  of a request, with its pictures and videos (32MiB)
        """;

    public static int Run(
        string[] args, bool help, TextWriter output, TextWriter error, Runners runners)
    {
        if (help)
        {
            output.WriteLine(Usage);
            output.Write(TrainWriter.HelpOfAsking());
            return 0;
        }

        var own = new OwnOptions(args,
            [
                "--adapter", "--name", "--port", "--host", "--api_key", "--batch", "--max_waiting",
                "--max_body",
            ],
            []);
        if (own.Rest.Length == 0 || own.Rest[0].StartsWith('-'))
            throw new InputException("serve: the folder of a model is missing: cpmx serve MODEL");
        ServeOptions options = Options(own);
        var (model, maker, settings) = ChatCommand.Open(own, runners, error);
        using var opened = model;
        if (settings.NumBeams > 1)
            throw new InputException("serve: num_beams is for chat, eval and predict: answers of "
                + "beams are known at the end alone");
        string name = own.Text("--name") ?? Path.GetFileName(
            Path.TrimEndingDirectorySeparator(Path.GetFullPath(own.Rest[0])));
        return Serve(options, name, model, settings, maker, output).GetAwaiter().GetResult();
    }

    private static async Task<int> Serve(ServeOptions options, string name, AskedModel model,
        GenerationSettings settings, PromptMaker maker, TextWriter output)
    {
        long first = 0;
        var stop = new TaskCompletionSource(
            TaskCreationOptions.RunContinuationsAsynchronously);
        await using var server = new ChatServer(
            options, name, model, settings, maker, output.WriteLine);
        await server.Start();
        using var interrupt = PosixSignalRegistration.Create(PosixSignal.SIGINT, Stop);
        using var terminate = PosixSignalRegistration.Create(PosixSignal.SIGTERM, Stop);
        output.WriteLine($"{model.Model.Spec.Family} on {model.Model.DeviceName}"
            + (model.Adapter is { } adapter ? $", adapter {adapter}" : ""));
        output.WriteLine($"serving \"{name}\" at {server.Address} (page), {server.Address}/v1 "
            + "(OpenAI's API); Ctrl-C ends");
        await stop.Task;
        output.WriteLine("ending when what runs is answered (once more ends at once)");
        await server.Stop();
        return 0;

        void Stop(PosixSignalContext context)
        {
            // A signal that comes to the process and to its group is one.
            long now = Stopwatch.GetTimestamp();
            long before = Interlocked.CompareExchange(ref first, now, 0);
            context.Cancel = before == 0
                || Stopwatch.GetElapsedTime(before, now).TotalSeconds < StopSignals.EchoSeconds;
            stop.TrySetResult();
        }
    }

    private static ServeOptions Options(OwnOptions own)
    {
        string? key = own.Text("--api_key") ?? Environment.GetEnvironmentVariable(KeyVariable);
        string host = own.Text("--host") ?? "127.0.0.1";
        if (!IPAddress.TryParse(host == "localhost" ? "127.0.0.1" : host, out var address))
            throw new InputException($"--host is {Messages.Quote(host)}, expected an address such "
                + "as 127.0.0.1 or 0.0.0.0");
        if (!IPAddress.IsLoopback(address) && string.IsNullOrEmpty(key))
            throw new InputException($"--host {host} opens the model to other machines: set a key "
                + $"by --api_key or ${KeyVariable}");
        var options = new ServeOptions { Host = address, Key = string.IsNullOrEmpty(key) ? null : key };
        return options with
        {
            Port = Number("--port", 0, 65535, options.Port),
            Batch = Number("--batch", 1, 256, options.Batch),
            MostWaiting = Number("--max_waiting", 1, 100_000, options.MostWaiting),
            MostBytes = own.Text("--max_body") is { } size
                ? Bytes(size) : options.MostBytes,
        };

        int Number(string name, int least, int most, int otherwise) =>
            own.Text(name) is not { } text ? otherwise
                : int.TryParse(text, NumberStyles.None, CultureInfo.InvariantCulture, out int n)
                    && n >= least && n <= most ? n
                : throw new InputException($"{name} is {Messages.Quote(text)}, expected a whole "
                    + $"number from {least} to {most}");
    }

    private static long Bytes(string size) =>
        MemoryLimit.Parse(size)?.Bytes(0) is > 0 and <= 1 << 30 and var bytes ? bytes
            : throw new InputException(
                $"--max_body is {Messages.Quote(size)}, expected up to 1GiB, such as 32MiB");
}
