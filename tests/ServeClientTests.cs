using System.ClientModel;
using System.Diagnostics;
using System.Net.WebSockets;
using System.Text;
using System.Text.Json;
using System.Text.Json.Nodes;
using MiniCpmNative.Cli.Serve;
using NUnit.Framework;
using OpenAI.Chat;

namespace MiniCpmNative.Tests;

/// <summary>cpmx serve as others use it: OpenAI's own client, and its page in a browser.</summary>
[TestFixture]
public sealed class ServeClientTests
{
    // What the official chat() answers with the base model: reference/generation.
    private const string Question = "What is in the picture?", Answer = "signhohohohohohoho";

    private static readonly string s_picture =
        Path.Combine(ReferenceFile.Root, "v26", "data", "images", "p0.png");

    private ServedModel _served = null!;

    private ChatServer Server => _served.Server;

    [OneTimeSetUp]
    public async Task Serve() =>
        _served = await ServedModel.Start(new ServeOptions { Port = 0 }, most: 8);

    [OneTimeTearDown]
    public async Task End() => await _served.DisposeAsync();

    [Test]
    public async Task TheClientOfOpenAiIsAnswered()
    {
        var client = new ChatClient("tiny:base", new ApiKeyCredential("none"),
            new() { Endpoint = new Uri(Server.Address + "/v1") });
        ChatMessage[] messages =
        [
            new UserChatMessage(
                ChatMessageContentPart.CreateImagePart(
                    BinaryData.FromBytes(await File.ReadAllBytesAsync(s_picture)), "image/png"),
                ChatMessageContentPart.CreateTextPart(Question)),
        ];
        var options = new ChatCompletionOptions { Temperature = 0, MaxOutputTokenCount = 8 };
        ChatCompletion whole = await client.CompleteChatAsync(messages, options);
        Assert.That(whole.Content[0].Text, Is.EqualTo(Answer));
        Assert.That(whole.FinishReason, Is.EqualTo(ChatFinishReason.Length));
        Assert.That(whole.Usage.OutputTokenCount, Is.EqualTo(8));
        var streamed = new StringBuilder();
        await foreach (StreamingChatCompletionUpdate update in
            client.CompleteChatStreamingAsync(messages, options))
            foreach (ChatMessageContentPart part in update.ContentUpdate)
                streamed.Append(part.Text);
        Assert.That(streamed.ToString(), Is.EqualTo(Answer));
        var missing = new ChatClient("another", new ApiKeyCredential("none"),
            new() { Endpoint = new Uri(Server.Address + "/v1") });
        ClientResultException? failure = await Assert.ThrowsAsync<ClientResultException>(
            () => missing.CompleteChatAsync(messages));
        Assert.That(failure!.Message, Does.Contain("there is no model \"another\""));
    }

    // A picture is put in, both models are asked, and their answers stand side by side.
    [Test]
    public async Task ThePageShowsBothAnswers()
    {
        using var browser = await Browser.Open(Server.Address + "/");
        await browser.Until("typeof sides === 'object' && sides.length === 2");
        string picture = Convert.ToBase64String(await File.ReadAllBytesAsync(s_picture));
        await browser.Run($$"""
            add([new File([Uint8Array.from(atob("{{picture}}"), c => c.charCodeAt(0))], "p0.png",
                { type: "image/png" })])
            """);
        await browser.Until("document.querySelector('#pictures img')?.naturalWidth > 0");
        await browser.Run($"$('question').value = '{Question}'; $('ask').click()");
        await browser.Until("running === null && sides.every(side => side.messages.length === 2)");
        string[] cards = [.. JsonNode.Parse(await browser.Run(
            "JSON.stringify([...document.querySelectorAll('#answers .card')].map(c => "
                + "c.innerText))"))!
            .AsArray().Select(card => card!.GetValue<string>())];
        Assert.That(cards[0], Does.StartWith("tiny\n").And.Contain(Question));
        Assert.That(cards[1], Does.StartWith("tiny:base\n").And.Contain(Question));
        Assert.That(await browser.Run("document.querySelectorAll('.bad').length"), Is.EqualTo("0"));
        // A second turn goes on with what was said.
        await browser.Run("$('question').value = 'And now?'; $('ask').click()");
        await browser.Until("running === null && sides.every(side => side.messages.length === 4)");
        if (Environment.GetEnvironmentVariable("CPMX_SCREENSHOT") is { } file)
            await File.WriteAllBytesAsync(file, await browser.Screenshot());
    }

    // A headless Chromium, driven through its own protocol.
    private sealed class Browser : IDisposable
    {
        private readonly Process _process;
        private readonly DirectoryInfo _folder;
        private readonly ClientWebSocket _socket = new();
        private int _calls;

        private Browser(Process process, DirectoryInfo folder) =>
            (_process, _folder) = (process, folder);

        public static async Task<Browser> Open(string url)
        {
            string? program = new[] { "/usr/bin/chromium", "/usr/bin/google-chrome" }
                .FirstOrDefault(File.Exists);
            if (program is null) Assert.Ignore("no Chromium here (Debian: apt install chromium)");
            var folder = Directory.CreateTempSubdirectory("cpmx-browser-");
            var process = Process.Start(new ProcessStartInfo(program!,
            [
                "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-sync",
                "--disable-background-networking", "--disable-component-update",
                "--remote-debugging-port=0", $"--user-data-dir={folder.FullName}", url,
            ])
            { RedirectStandardError = true })!;
            process.BeginErrorReadLine();
            var browser = new Browser(process, folder);
            try
            {
                await browser.Connect(url);
                return browser;
            }
            catch
            {
                browser.Dispose();
                throw;
            }
        }

        public void Dispose()
        {
            _socket.Dispose();
            _process.Kill(entireProcessTree: true);
            _process.WaitForExit();
            _process.Dispose();
            try
            {
                _folder.Delete(recursive: true);
            }
            catch (IOException)
            {
                // Something of the browser still writes.
            }
        }

        /// <summary>The value of an expression, awaited, as text.</summary>
        public async Task<string> Run(string expression)
        {
            JsonElement result = await Call("Runtime.evaluate", new JsonObject
            {
                ["expression"] = expression,
                ["awaitPromise"] = true,
            });
            if (result.TryGetProperty("exceptionDetails", out var details))
                throw new AssertionException(details.GetRawText());
            return result.GetProperty("result").TryGetProperty("value", out var value)
                ? value.ToString() : "";
        }

        public async Task Until(string condition)
        {
            for (int i = 0; i < 600; i++)
            {
                if (await Run($"Boolean({condition})") is "true" or "True") return;
                await Task.Delay(100);
            }

            throw new AssertionException(
                $"{condition} does not come: {await Run("document.body.innerText")}");
        }

        public async Task<byte[]> Screenshot() => (await Call("Page.captureScreenshot", []))
            .GetProperty("data").GetBytesFromBase64();

        private async Task Connect(string url)
        {
            string port = Path.Combine(_folder.FullName, "DevToolsActivePort");
            using var client = new HttpClient();
            for (int i = 0; ; i++)
            {
                await Task.Delay(100);
                if (i == 600 || _process.HasExited)
                    throw new AssertionException("Chromium does not start");
                if (!File.Exists(port) || File.ReadAllLines(port) is not [var number, ..]) continue;
                using JsonDocument pages = JsonDocument.Parse(
                    await client.GetStringAsync($"http://127.0.0.1:{number}/json"));
                JsonElement page = pages.RootElement.EnumerateArray().FirstOrDefault(
                    p => p.GetProperty("url").GetString() == url);
                if (page.ValueKind == JsonValueKind.Undefined) continue;
                await _socket.ConnectAsync(
                    new Uri(page.GetProperty("webSocketDebuggerUrl").GetString()!), default);
                return;
            }
        }

        private async Task<JsonElement> Call(string method, JsonObject parameters)
        {
            int id = ++_calls;
            await _socket.SendAsync(Encoding.UTF8.GetBytes(new JsonObject
            {
                ["id"] = id,
                ["method"] = method,
                ["params"] = parameters,
            }.ToJsonString()), WebSocketMessageType.Text, true, default);
            var buffer = new byte[1 << 16];
            while (true)
            {
                using var message = new MemoryStream();
                ValueWebSocketReceiveResult part;
                do
                {
                    part = await _socket.ReceiveAsync(buffer.AsMemory(), default);
                    message.Write(buffer, 0, part.Count);
                }
                while (!part.EndOfMessage);
                JsonElement reply =
                    JsonSerializer.Deserialize<JsonElement>(message.ToArray().AsSpan());
                if (reply.TryGetProperty("id", out var its) && its.GetInt32() == id)
                    return reply.GetProperty("result");
            }
        }
    }
}
