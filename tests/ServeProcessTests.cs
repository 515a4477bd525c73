using System.Diagnostics;
using System.Net;
using System.Net.Sockets;
using System.Runtime.InteropServices;
using System.Text;
using NUnit.Framework;

namespace MiniCpmNative.Tests;

/// <summary>cpmx serve as a process: how it begins, and how it ends.</summary>
[TestFixture]
public sealed class ServeProcessTests
{
    // So many tokens that it is still at work when the signal comes.
    private const int Terminate = 15, Most = 1200;

    // What runs is answered to its end, who waits is told, and nobody else comes in.
    [Test, CancelAfter(120_000)]
    public async Task SigtermFinishesWhatRuns(CancellationToken patience)
    {
        if (!OperatingSystem.IsLinux()) Assert.Ignore("signals are sent as on Linux");
        using Process process = Start(
            "serve", V26.Model, "--port", "0", "--name", "tiny", "--device", "cpu", "--batch", "1",
            "--max_new_tokens", $"{Most}", "--min_new_tokens", $"{Most}");
        try
        {
            string line = "";
            while (!line.Contains("serving \"tiny\" at ", StringComparison.Ordinal))
                line = await process.StandardOutput.ReadLineAsync(patience)
                    ?? throw new AssertionException("it does not begin to serve");
            var address = new Uri(line.Split(" at ")[1].Split(' ')[0]);
            using var http = new HttpClient { BaseAddress = address };
            using HttpResponseMessage running = await Ask(http, stream: true, Most, patience);
            using var reader = new StreamReader(await running.Content.ReadAsStreamAsync(patience));
            var events = new List<string>();
            while (events.Count < 4) await Next();
            // One after the other they would take many times as long as is waited here.
            Task<HttpResponseMessage>[] wait =
                [.. Enumerable.Range(0, 16).Select(_ => Ask(http, stream: false, Most, patience))];
            await Task.Delay(300, patience);
            Assert.That(SendSignal(process.Id, Terminate), Is.Zero);
            while (await Next()) { }
            Assert.That(events[^1], Is.EqualTo("data: [DONE]"));
            Assert.That(events[^2], Does.Contain("\"finish_reason\":\"").And.Not.Contain("error"));
            HttpResponseMessage[] told = await Task.WhenAll(wait);
            Assert.That(told.Select(reply => reply.StatusCode), Has.All
                .EqualTo(HttpStatusCode.OK).Or.EqualTo(HttpStatusCode.ServiceUnavailable));
            HttpResponseMessage[] refused =
                [.. told.Where(reply => reply.StatusCode != HttpStatusCode.OK)];
            Assert.That(refused, Has.Length.GreaterThan(told.Length / 2));
            foreach (HttpResponseMessage reply in refused)
                Assert.That(await reply.Content.ReadAsStringAsync(patience),
                    Does.Contain("the server is being shut down"));
            string rest = await process.StandardOutput.ReadToEndAsync(patience);
            await process.WaitForExitAsync(patience);
            Assert.That(process.ExitCode, Is.Zero, rest);
            Assert.That(rest, Does.Contain("ending when what runs is answered"));
            Assert.That(() => http.GetAsync("/v1/models", patience),
                Throws.InstanceOf<HttpRequestException>());

            async Task<bool> Next()
            {
                string? text = await reader.ReadLineAsync(patience);
                if (text is { Length: > 0 }) events.Add(text);
                return text is not null;
            }
        }
        finally
        {
            if (!process.HasExited) process.Kill();
        }
    }

    [Test, CancelAfter(60_000)]
    public async Task APortThatIsTakenIsNamed(CancellationToken patience)
    {
        using var taken = new TcpListener(IPAddress.Loopback, 0);
        taken.Start();
        int port = ((IPEndPoint)taken.LocalEndpoint).Port;
        using Process process = Start(
            "serve", V26.Model, "--port", $"{port}", "--device", "cpu");
        string error = await process.StandardError.ReadToEndAsync(patience);
        await process.WaitForExitAsync(patience);
        Assert.That(process.ExitCode, Is.EqualTo(2));
        Assert.That(error, Does.Contain($"port {port} on 127.0.0.1 cannot be had")
            .And.Contain("--port takes another"));
    }

    private static Task<HttpResponseMessage> Ask(
        HttpClient http, bool stream, int tokens, CancellationToken patience)
    {
        var request = new HttpRequestMessage(HttpMethod.Post, ServedModel.Completions)
        {
            Content = new StringContent(
                $$"""
                {"messages": [{"role": "user", "content": "Name a colour."}], "temperature": 0,
                "stream": {{(stream ? "true" : "false")}}, "max_tokens": {{tokens}}}
                """, Encoding.UTF8, "application/json"),
        };
        return http.SendAsync(request, stream ? HttpCompletionOption.ResponseHeadersRead
            : HttpCompletionOption.ResponseContentRead, patience);
    }

    private static Process Start(params string[] arguments) => Process.Start(new ProcessStartInfo(
        Environment.GetEnvironmentVariable("DOTNET_HOST_PATH") ?? "dotnet",
        [Path.Combine(AppContext.BaseDirectory, "cpmx.dll"), .. arguments])
    {
        RedirectStandardOutput = true,
        RedirectStandardError = true,
    })!;

    [DllImport("libc", EntryPoint = "kill")]
    private static extern int SendSignal(int process, int signal);
}
